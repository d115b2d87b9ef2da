"""The command line: its output and files, its exit codes, and errors without a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import Net, fit, loader
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file

from lightning_autoprune import AutoPruneCallback, load_sparse, save_sparse, sparsity
from lightning_autoprune.cli import main


class Example(Net):
    example_input_array = torch.zeros(1, 12)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    saving = ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}")
    fit([AutoPruneCallback(target_sparsity=0.8), saving], val=loader(seed=3), enable_checkpointing=True)
    return [str(folder / f"epoch={epoch}.ckpt") for epoch in range(4)]


def test_a_report_has_a_description_and_a_table_of_the_layers(checkpoints, capsys):
    assert main(["report", checkpoints[3]]) == 0
    first, _, head, *lines = capsys.readouterr().out.splitlines()
    assert first == (f"{checkpoints[3]}: 80.08% of 256 weights are 0 (5.0×). Epoch 3, step 32. The masks are final.")
    assert head.split() == ["layer", "shape", "weights", "kept", "sparsity", "revived"]
    assert [line.split()[0] for line in lines] == ["first", "last", "all"]
    assert lines[2].split()[1:4] == ["256", "51", "80.08%"]


def test_a_json_report_has_all_figures(checkpoints, capsys):
    assert main(["report", checkpoints[3], "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["phase"] == "frozen"
    assert sum(layer["kept"] for layer in figures["layers"]) == 51
    assert figures["curves"]["all"][-1] == [31, pytest.approx(figures["sparsity"])]


def test_an_html_report_is_written_completely(checkpoints, tmp_path, capsys):
    page = tmp_path / "report.html"
    assert main(["report", checkpoints[3], "--html", str(page)]) == 0
    assert page.read_text(encoding="utf-8").endswith("</html>\n")
    assert f"wrote {page}" in capsys.readouterr().err


def test_a_file_without_a_pruning_state_is_reported_with_its_zeros(tmp_path, capsys):
    torch.save({"a.weight": torch.eye(4)}, tmp_path / "plain.pt")
    assert main(["report", str(tmp_path / "plain.pt")]) == 0
    out = capsys.readouterr().out
    assert "75.00% of 16 weights are 0 (4.0×). It has no pruning state" in out


def test_two_checkpoints_are_compared(checkpoints, capsys):
    assert main(["compare", checkpoints[1], checkpoints[3]]) == 0
    out = capsys.readouterr().out
    assert "Saved while the masks were still changing." in out
    assert main(["compare", checkpoints[1], checkpoints[3], "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    state = [torch.load(path, weights_only=True)["state_dict"] for path in (checkpoints[1], checkpoints[3])]
    before, after = (s["first.weight"] != 0 for s in state)
    assert layers[0]["revived"] == int((after & ~before).sum())
    assert layers[0]["pruned"] == int((before & ~after).sum())
    assert layers[-1]["name"] == "all"


def test_layers_missing_from_one_checkpoint_are_named(tmp_path, capsys):
    torch.save({"a.weight": torch.eye(4), "b.weight": torch.eye(2)}, tmp_path / "one.pt")
    torch.save({"a.weight": torch.eye(4), "b.weight": torch.eye(3), "c.weight": torch.eye(2)}, tmp_path / "two.pt")
    assert main(["compare", str(tmp_path / "one.pt"), str(tmp_path / "two.pt")]) == 0
    assert capsys.readouterr().out.endswith("not in both, or with another shape: b, c\n")


def test_a_sparse_file_is_exact_and_needs_no_model(checkpoints, tmp_path, capsys):
    out = tmp_path / "pruned.safetensors"
    assert main(["export", checkpoints[3], "--sparse", str(out)]) == 0
    state = torch.load(checkpoints[3], weights_only=True)["state_dict"]
    loaded = load_sparse(out)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    assert sparsity(loaded["first.weight"]) > 0.5
    assert "smaller than the dense weights (" in capsys.readouterr().out


def test_a_shrunk_program_and_an_onnx_file_give_the_outputs_of_the_model(checkpoints, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    onnx, program = tmp_path / "net.onnx", tmp_path / "net.pt2"
    arguments = ["--model", "test_cli:Example", "--onnx", str(onnx), "--shrunk", str(program)]
    assert main(["export", checkpoints[3], *arguments]) == 0
    x = torch.randn(5, 12)
    model = Example.load_from_checkpoint(checkpoints[3]).eval()
    assert torch.allclose(torch.export.load(program).module()(x), model(x), atol=1e-5)
    session = onnxruntime.InferenceSession(onnx)
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert torch.allclose(torch.from_numpy(output), model(x), atol=1e-5)


def make_net() -> torch.nn.Module:
    """Return a model: a plain function for ``--model``."""
    return Net()


def raise_error() -> torch.nn.Module:
    """Raise an error, as the user's own code may do."""
    return 1 / 0


def test_a_model_can_come_from_a_function_and_an_input_shape(checkpoints, tmp_path):
    program = tmp_path / "net.pt2"
    arguments = ["--model", "test_cli:make_net", "--input-shape", "1", "12", "--shrunk", str(program)]
    assert main(["export", checkpoints[3], *arguments]) == 0
    assert torch.export.load(program).module()(torch.zeros(3, 12)).shape == (3, 4)


@pytest.mark.parametrize("save", [torch.save, save_file, save_sparse], ids=["torch", "safetensors", "sparse"])
def test_a_lightning_module_takes_a_state_that_lightning_did_not_save(save, checkpoints, tmp_path):
    state, program = torch.load(checkpoints[3], weights_only=True)["state_dict"], tmp_path / "net.pt2"
    save(state, tmp_path / "state")
    assert main(["export", str(tmp_path / "state"), "--model", "test_cli:Example", "--shrunk", str(program)]) == 0
    model, x = Example.load_from_checkpoint(checkpoints[3]).eval(), torch.randn(5, 12)
    assert torch.allclose(torch.export.load(program).module()(x), model(x), atol=1e-5)


class WithObject(Example):
    """A module whose hyperparameters hold an object, and whose layers have a state of their own."""

    def __init__(self, where: Path | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


@pytest.fixture(scope="module")
def with_object(tmp_path_factory):
    saving = ModelCheckpoint(tmp_path_factory.mktemp("object"), filename="a")
    fit([AutoPruneCallback(target_sparsity=0.8), saving], WithObject(Path("x")), enable_checkpointing=True)
    return saving.best_model_path


def test_objects_and_extra_states_in_a_file_are_passed_over_in_every_command(with_object, tmp_path, capsys):
    assert main(["report", with_object, "--html", str(tmp_path / "a.html")]) == 0
    out = capsys.readouterr().out
    assert "The masks are final. Entries that are passed over: '_extra_state' (of the type dict)." in out
    assert main(["compare", with_object, with_object]) == 0
    assert main(["export", with_object, "--sparse", str(tmp_path / "a"), "--model", "test_cli:make_with_object"]) == 0
    assert "note: Entries that are passed over: '_extra_state'" in capsys.readouterr().err
    assert load_sparse(tmp_path / "a").keys() == {*torch.load(with_object, weights_only=False)["state_dict"]} - {
        "_extra_state"
    }


def make_with_object() -> torch.nn.Module:
    """Return a module that needs no arguments."""
    return WithObject()


def test_a_module_is_built_without_loading_the_objects_of_the_file(with_object, tmp_path, capsys):
    program = tmp_path / "net.pt2"
    assert main(["export", with_object, "--model", "test_cli:WithObject", "--shrunk", str(program)]) == 1
    assert (
        "its hyperparameters hold objects, and loading them could run any code from the file. Name a LightningModule"
        in capsys.readouterr().err
    )
    assert main(["export", with_object, "--model", "test_cli:make_with_object", "--shrunk", str(program)]) == 0


@pytest.mark.parametrize("model", ["Example", "make_net"])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model."])
def test_a_model_takes_weights_whose_names_have_other_prefixes(model, prefix, checkpoints, tmp_path, capsys):
    checkpoint, program = torch.load(checkpoints[3], weights_only=True), tmp_path / "net.pt2"
    checkpoint["state_dict"] = {f"{prefix}{key}": x for key, x in checkpoint["state_dict"].items()}
    torch.save(checkpoint, tmp_path / "renamed.ckpt")
    arguments = ["--model", f"test_cli:{model}", "--input-shape", "1", "12", "--shrunk", str(program)]
    assert main(["export", str(tmp_path / "renamed.ckpt"), *arguments]) == 0
    assert f"the model takes 'first.weight' from '{prefix}first.weight'," in capsys.readouterr().err
    expected, x = Example.load_from_checkpoint(checkpoints[3]).eval(), torch.randn(5, 12)
    assert torch.allclose(torch.export.load(program).module()(x), expected(x), atol=1e-5)


def test_a_file_without_a_layer_of_the_model_is_refused(checkpoints, tmp_path, capsys):
    checkpoint = torch.load(checkpoints[3], weights_only=True)
    del checkpoint["state_dict"]["last.weight"]
    torch.save(checkpoint, tmp_path / "part.ckpt")
    for model in ("Example", "make_net"):
        assert main(["export", str(tmp_path / "part.ckpt"), "--model", f"test_cli:{model}", "--onnx", "a"]) == 1
        assert 'Missing key(s) in state_dict: "last.weight"' in capsys.readouterr().err


def test_files_of_one_model_are_compared_whatever_the_prefixes_of_their_names(checkpoints, tmp_path, capsys):
    state = torch.load(checkpoints[1], weights_only=True)["state_dict"]
    torch.save({f"module._orig_mod.{key}": x for key, x in state.items()}, tmp_path / "plain.pt")
    outputs = []
    for first in (checkpoints[1], str(tmp_path / "plain.pt")):
        for pair in ([first, checkpoints[3]], [checkpoints[3], first]):
            assert main(["compare", *pair, "--json"]) == 0
            outputs.append(json.loads(capsys.readouterr().out))
    for renamed, plain in zip(outputs[2:], outputs[:2], strict=True):
        assert [row["both"] for row in renamed["layers"]] == [row["both"] for row in plain["layers"]]
        assert renamed["not_in_both"] == []


def test_a_sparse_export_needs_no_example_input(checkpoints, tmp_path):
    assert main(["export", checkpoints[3], "--sparse", str(tmp_path / "a"), "--model", "test_cli:make_net"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "none.ckpt"], "error: [Errno 2] No such file or directory: 'none.ckpt'"),
        (["report", "broken.ckpt"], "error: broken.ckpt is not a checkpoint, or not a complete one"),
        (["report", "."], "error: [Errno 21] Is a directory"),
        (["export", "plain.pt"], "error: Nothing to write: give `--sparse`, `--onnx` or `--shrunk`."),
        (["export", "plain.pt", "--onnx", "a"], "error: `--onnx` and `--shrunk` need to run the model: give `--model"),
        (
            ["export", "plain.pt", "--onnx", "a", "--model", "nowhere:Net"],
            "error: `--model` is 'nowhere:Net', which can't be",
        ),
        (
            ["export", "plain.pt", "--onnx", "a", "--model", "test_cli"],
            "error: `--model` is 'test_cli', which can't be im",
        ),
        (
            ["export", "plain.pt", "--onnx", "a", "--model", "test_cli:make_net"],
            "error: test_cli:make_net does not take the w",
        ),
        (
            ["export", "net.pt", "--onnx", "a", "--model", "test_cli:make_net"],
            "error: Net has no `example_input_array`: ",
        ),
        (
            ["export", "plain.pt", "--onnx", "a", "--model", "broken_module:Net"],
            "error: `--model` is 'broken_module:Net', which can't be imported: SyntaxError: ",
        ),
        (
            ["export", "net.pt", "--onnx", "a", "--model", "test_cli:raise_error"],
            "error: test_cli:raise_error does not take the weights of net.pt: ZeroDivisionError: division by zero.",
        ),
        (
            ["export", "plain.pt", "--sparse", "no/folder/a"],
            "error: [Errno 2] No such file or directory: 'no/folder/a'",
        ),
        (["report", "plain.pt", "--html", "no/folder/a"], "error: [Errno 2] No such file or directory: 'no/folder/a'"),
        (["report", "plain.pt", "--html", "."], "error: [Errno 22] not a regular file: '.'"),
        (["report", "plain.pt", "--html", "plain.pt/a"], "error: [Errno 20] Not a directory: 'plain.pt/a'"),
        (
            ["compare", "plain.pt", "net.pt"],
            "error: No layer has the same name and shape in both. The first has a (4, 4).",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_are_one_line_on_stderr_and_exit_code_1(arguments, message, capsys):
    torch.save({"a.weight": torch.eye(4)}, "plain.pt")
    torch.save(Net().state_dict(), "net.pt")
    Path("broken.ckpt").write_bytes(b"PK\3\4")
    Path("broken_module.py").write_text("class Net(:")
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert err.splitlines()[-1].startswith(message)
    assert "Traceback" not in out + err


@pytest.mark.parametrize(
    "arguments",
    [[], ["prune"], ["report"], ["export", "a", "--input-shape", "x"], ["demo", "--epochs", "0"]],
    ids=str,
)
def test_invalid_arguments_give_exit_code_2(arguments):
    with pytest.raises(SystemExit) as exit_code:
        main(arguments)
    assert exit_code.value.code == 2


def test_a_closed_pipe_is_no_error(checkpoints):
    command = [sys.executable, "-m", "lightning_autoprune", "report", checkpoints[3]]
    reading = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    reading.stdout.close()
    assert reading.wait(timeout=60) == 141
    assert reading.stderr.read() == ""


def test_the_command_is_installed_and_its_help_has_examples():
    command = Path(sys.executable).with_name("lightning-autoprune")
    text = subprocess.run([command, "--help"], capture_output=True, text=True, check=True).stdout
    for line in ("lightning-autoprune report pruned.ckpt --html report.html", "exit codes: 0 success;"):
        assert line in text
    for name in ("demo", "report", "compare", "export"):
        assert f"    {name} " in text


@pytest.mark.parametrize("name", ["demo", "report", "compare", "export"])
def test_each_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as exit_code:
        main([name, "--help"])
    assert exit_code.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: lightning-autoprune {name} " in text
    assert f"examples:\n  lightning-autoprune {name} " in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "a", "--input-shape", "0", "4"], "argument --input-shape: 0 is not at least 1"),
        (["demo", "--seed", "-1"], "argument --seed: -1 is not from 0 to 4294967295"),
        (["demo", "--epochs", "few"], "argument --epochs: 'few' is not an integer"),
    ],
)
def test_invalid_numbers_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_a_file_that_lightning_did_not_write_may_have_any_entry_named_step(capsys, tmp_path):
    torch.save({"a.weight": torch.zeros(4, 0), "epoch": torch.ones(1), "global_step": "b"}, "other.pt")
    assert main(["report", "other.pt", "--json", "--html", str(tmp_path / "a.html")]) == 0
    torch.save({"state_dict": {"a.weight": torch.eye(4)}, "global_step": 5}, "step.pt")
    assert main(["report", "step.pt"]) == 0
    assert "Step 5." in capsys.readouterr().out
