"""Methods that choose among heads; each file that registers a method is found by being here."""
