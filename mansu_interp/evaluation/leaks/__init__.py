"""The leak test: are forgotten facts given away where nobody trained against it?

`templates` reads what is asked, `asking` makes each `question` for a task and a model, `answers`
asks a model, `scoring` judges what came back; `found` is what it says.
"""
