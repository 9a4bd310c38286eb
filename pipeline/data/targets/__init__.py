"""Targets: the one place where a source's labels and numbers become what is learned.

`labels` looks at raw ones; `classes` fits their names, `fitting` all that is needed to prepare them and to
name answers.
"""
