"""A sound file to samples to log-mel features, on the host: decode, stream, cut into windows, Kaldi filter bank."""
