"""Information-bottleneck multimodal alignment: the package exported from the notebooks of the book."""
__version__ = "0.1.0"
