"""A network's architecture from a reference such as `timm:resnet18` or `python:mine.py:make`."""
