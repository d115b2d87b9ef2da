"""Where the data that trains M comes from."""
