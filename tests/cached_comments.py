"""Command lines are parsed without reading the sources of their classes each time.

For its help, draccus looks for the comment of each field in the source of its class, whether help is asked
for or not, each time a command line is parsed: most of the time that this takes. Once this module is
imported, it looks once per process.
"""

import functools

from draccus.wrappers import docstring

docstring.get_attribute_docstring = functools.cache(docstring.get_attribute_docstring)
