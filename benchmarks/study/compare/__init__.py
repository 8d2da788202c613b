"""Compares ways to train the same MoE on the same text: the loss that each reaches, and its cost.

arms        ways to train, as changes of a configuration
accounting  loss over tokens, dollars and hours; the cost of a loss
reading     tokens that a run reads outside its training
run         runs the arms one after the other
table       result as a table; figures draws it as plots
"""
