"""The Audio Spectrogram Transformer in pure JAX/Flax.

`__init__.pyi` lists the public API. Each name is imported from its module at first use, so that `import ast_jax`
imports no JAX.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
