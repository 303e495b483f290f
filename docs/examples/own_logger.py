"""Send the numbers of every epoch somewhere of your own: here into an SQLite database.

For more than a function, such as pictures or a state that survives a resume, pass an object with
the methods of `visiontrain.Logger`.
"""

import sqlite3

import visiontrain as vt


def into_database(row, step):
    """Keep the loss and the score; `row` has the columns of results.csv."""
    with sqlite3.connect("runs.db") as database:
        database.execute("CREATE TABLE IF NOT EXISTS epochs (step, loss, top1)")
        values = (step, row["train/all/cls"], row["val/top1"])
        database.execute("INSERT INTO epochs VALUES (?, ?, ?)", values)


vt.train(data="digits", task="classify", logger=into_database, epochs=4)
with sqlite3.connect("runs.db") as database:
    for step, loss, top1 in database.execute("SELECT * FROM epochs ORDER BY step"):
        print(f"step {step}: loss {loss:.3f}, top-1 {top1:.3f}")
