"""How queries attend to the tokens that were chosen for them."""
