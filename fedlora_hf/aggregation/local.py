"""local: nobody shares anything; every client goes on with its own adapter. The baseline a federation has to beat."""
# SPDX-License-Identifier: Apache-2.0

from dataclasses import replace

from fedlora_hf.aggregation.cohort import Cohort
from fedlora_hf.aggregation.product_mean import product_mean
from fedlora_hf.methods.method import NoOptions
from fedlora_hf.update import Aggregate


def local(cohort: Cohort, options: NoOptions) -> Aggregate:
    """Personalised: each client's own update, as it is. The mean is given for comparison; nobody uses it."""
    own = {update.client_id: update.state for update in cohort.updates}
    return replace(product_mean(cohort, options), personalised=own)
