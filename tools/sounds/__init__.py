"""Parts of `sounds_data.py` and `instruments_data.py`: cutting recordings, and synthesis of sounds."""
