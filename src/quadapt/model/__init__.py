"""Work on whole models, of any class: which layers to quantize, quantizing them, merging adapters into them, reporting on them.

Nothing here knows of files, configurations or trainers.
"""
