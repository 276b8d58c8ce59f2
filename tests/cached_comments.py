"""Command lines are parsed in half the time, in the tests' process and in those that it forks.

For its help, draccus looks for the comment of each field in the source of its class, whether help is asked
for or not, each time a command line is parsed. Once this module is imported, it looks once per process.
"""

import functools

from draccus.wrappers import docstring

docstring.get_attribute_docstring = functools.cache(docstring.get_attribute_docstring)
