"""What makers of a release run: the documentation's site, the matrix of environments, the release itself."""
