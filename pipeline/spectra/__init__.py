"""What the spectra and audit stages run on the cluster: calibration, decomposition, audit."""
