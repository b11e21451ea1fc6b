"""What a run needs to go on exactly: saved while training goes on, found again, checked and restored on any
layout.
"""
