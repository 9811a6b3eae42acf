"""The processes of a run (torchrun's ranks), the device of each, and what they tell each other."""


