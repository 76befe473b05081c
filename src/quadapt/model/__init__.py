"""Work on whole models, of any class: which layers to quantize, and quantizing them.

Nothing here knows of files, configurations or trainers.
"""
