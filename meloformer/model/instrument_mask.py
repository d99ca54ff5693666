"""Which instruments may begin the next group, by the band list alone: what the loss need not distinguish."""

import torch
from torch import Tensor

from ..kernels import Structure
from ..tokens import vocab
from .inputs import HEAD, Scan


@torch.no_grad()
def forbidden_instruments(ids_BN: Tensor, structure: Structure) -> Tensor:
    """INST ids that cannot be the next one in the bar: bool [B, N, INST], on the device of `ids_BN`.

    Groups stand in the order of the band list. So after a group only instruments further down the list may
    follow, and none that is not listed; those before the first group of a bar may be any of the list.

    Args:
        ids_BN: token ids, integer [B, N], of documents that begin with their band lists.
        structure: of the same tokens; its summaries bound the number of documents in a row.

    As with `read_context`, the host waits for the device only the first time. What padding gets means
    nothing.
    """
    scan = Scan(ids_BN.long(), structure)
    ids, doc = scan.ids, structure.doc.long().clamp(min=0)

    # By document and instrument its place in the list, from 1; 0 if it is not listed. What is no BAND token
    # goes into a column that is cut off.
    instruments = len(vocab.BAND)
    column = torch.where(scan.is_of("BAND"), doc * (instruments + 1) + ids - vocab.BAND.start, instruments)
    documents = structure.summary_doc.shape[1]
    place = torch.zeros(len(ids), documents * (instruments + 1), dtype=torch.int16, device=ids.device)
    place.scatter_(1, column, (1 + structure.position).to(torch.int16))
    place = place.view(len(ids), -1, instruments + 1)[..., :instruments]

    is_inst = scan.is_of("INST")
    head = scan.last(scan.is_of(HEAD)).clamp(min=0)
    of_head = ids.gather(1, head)
    rank = (of_head - vocab.INST.start).clamp(0, instruments - 1)
    of_token = place.gather(1, doc[..., None].expand(-1, -1, instruments))
    reached = of_token.gather(2, rank[..., None])
    in_group = is_inst.gather(1, head) & (head >= scan.start)
    return of_token <= torch.where(in_group[..., None], reached, 0)
