"""Sweeps: one customer's data, many settings of its prefix, trained together and put side by side.

In: a customer of a fleet file and values to try. Out: for every setting its score on the dev split, the best of them on the test split, and a
page with the curve over prefix lengths (Li & Liang 2021, figure 4, for one's own data). Every setting is a slot of one mixed job, so the base is
loaded once and its passes are shared. Nothing of it is registered. Light to import.
"""
