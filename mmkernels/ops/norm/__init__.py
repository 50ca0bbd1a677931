"""LayerNorm with gain and bias of a layer or of each example, its residual addition, and rows from two tensors."""

from .api import explain_film_layer_norm, film_layer_norm

__all__ = ["explain_film_layer_norm", "film_layer_norm"]
