"""The power goes away: in a model of a disk (`disk.py`), and in a virtual machine (`machine.py`)."""
