"""The arms: what each does to prompts, rewards, gradients and at deployment, one page an arm.

`table` lists them; `stages` says what a stage is given and returns. Imports the maths (`proj`), the adapter
and problems; nothing here samples, grades or writes a gradient.
"""
