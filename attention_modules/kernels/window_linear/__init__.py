"""The hybrid: softmax in a window, linear attention before it."""
