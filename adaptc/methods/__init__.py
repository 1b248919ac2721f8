"""What an adaptation method states: its parameters, its expression, where it can sit, how PEFT spells it.

A file of `passes/insert/` needs no other room. Start with `method`. This room knows no graph, and imports torch only
when a method computes.
"""
