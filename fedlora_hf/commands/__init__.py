"""What each command of the command line does, apart from parsing its arguments."""
# SPDX-License-Identifier: Apache-2.0
