"""Other ways to train the same MoE than the configured one, on the same text: what each reaches, and its cost.

arms        the ways, as changes of a configuration
accounting  loss over tokens, dollars and hours; what a loss costs
reading     what a run reads outside its training
run         runs the arms one after the other
table       what a person reads; figures, what a person looks at
"""
