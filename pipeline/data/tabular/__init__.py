"""Tables: kinds of columns, and how rows become numbers, in training and in prediction.

`schema` describes Arrow columns and the layout of the matrix that they are encoded to; `encoder` fills the matrix.
"""
