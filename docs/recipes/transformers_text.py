"""transformers: prune BERT on tokenized text of different lengths, padded by the library's collator."""

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, DataCollatorWithPadding, PreTrainedTokenizerFast

from lightning_autoprune import AutoPruneCallback


class Classifier(LightningModule):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def training_step(self, batch, batch_idx):
        return self.network(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)


seed_everything(0)
words = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "and", "then", "slept"]
vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *words])}
word_level = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
word_level.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=word_level, pad_token="[PAD]", unk_token="[UNK]")
lengths = torch.randint(3, 15, (128,)).tolist()
texts = [" ".join(words[i] for i in torch.randint(len(words), (length,))) for length in lengths]
samples = [{**tokenizer(text), "label": int("cat" in text)} for text in texts]
train_loader = DataLoader(samples, batch_size=16, shuffle=True, collate_fn=DataCollatorWithPadding(tokenizer))

config = BertConfig(
    vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
)
model = Classifier(BertForSequenceClassification(config))
callback = AutoPruneCallback(target_sparsity=0.8, exclude=["network.classifier"])
trainer = Trainer(max_epochs=5, accelerator="cpu", logger=False, callbacks=[callback])
trainer.fit(model, train_loader)
print(f"sparsity {callback.sparsity:.3f}")
