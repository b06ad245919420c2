"""The deployed form: subnetworks that are sliced, tokens that are gathered."""
