"""Scores of a training set's items, by which `prune` chooses: one file a method.

| method | what makes an item hard |
|---|---|
| el2n | the length of its error vector early in training |
| grand | the length of its gradient early in training |
| forgetting | how often it was unlearned |
| prototypes | its distance from the nearest cluster of embeddings that were learned without labels |
| perplexity | its loss under a given model |

Every method gives a high score to what is hard.
"""
