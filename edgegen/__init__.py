"""edgegen: a compiler from few-step generative students to the devices that run them."""

__version__ = "0.1.0"
