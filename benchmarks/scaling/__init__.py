"""A model of how training scales: predicted speed, time and cost for a number of hosts, and what limits them.

`model` has the mathematics, `machine` the parameters and their presets, `predict` the predictions. `published` has
published runs to compare with. `calibrate` measures the parameters, and `check` compares predictions with real ranks.
"""
