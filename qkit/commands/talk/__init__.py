"""`qkit chat`: in comes a target and what is typed, out go answers as they are generated. Start at dialogue.py; targets.py opens models."""
