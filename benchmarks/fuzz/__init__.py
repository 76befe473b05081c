"""Damaged and odd input of every kind: no traceback, no wrong acceptance, no hang, nothing half written."""
