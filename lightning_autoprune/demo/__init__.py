"""Data and networks to try the callback on; ``lightning-autoprune demo`` trains them."""
