"""Tables: what columns hold, and how rows become numbers, in training and in prediction.

`contents` names what an Arrow type holds; `schema` lays a matrix out; `encode` fills it; `findings`
counts what is wrong.
"""
