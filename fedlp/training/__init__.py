"""Local training of one client: loop, calibration data, fine-tuning."""
