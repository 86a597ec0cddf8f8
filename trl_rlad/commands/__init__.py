"""The sub-commands of `trl-rlad`. What takes seconds to import, they import once their arguments are read."""

from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """The description as it stands, and the default of each argument that has one."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)
