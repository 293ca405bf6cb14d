"""Tables, charts and the page. Torch-free."""
