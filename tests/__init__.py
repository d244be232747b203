"""The tests; the folders mirror the sources, and stand beside journeys, faults and parity."""
