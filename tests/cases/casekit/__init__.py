"""What the cases need beyond the black-box harness: faults, a network that can be cut, records."""
