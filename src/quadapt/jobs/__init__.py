"""The commands, as functions of their settings: what the command line and Python call alike. One file each."""
