"""The acceptance gate's first half: speed and memory against the pinned legacy stack (marker ``gpu``)."""
