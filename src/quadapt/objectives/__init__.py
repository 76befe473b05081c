"""Objectives beyond the loss on the data: one file each."""
