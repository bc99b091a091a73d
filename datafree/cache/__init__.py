"""What is kept between runs: finished stages and proxies, within a limit of disk space."""
