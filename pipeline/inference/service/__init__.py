"""The HTTP service: many customers' prefixes on one base, in one batch, behind an interface like OpenAI's.

Which module knows what: `keys` who may ask for whom, `hosts` what means this machine, `limits` how much of it, `turns` how keys share
threads, `protocol` what requests and answers look like, `registered` which version a name means now, `loop` the thread that decodes,
`metrics` what is counted, `app` how a request goes through all of these, `connection` how long a client may be silent, `run` the process.
"""
