"""Which instruments may begin the next group, by the band list alone: what the loss need not distinguish."""

import torch
from torch import Tensor

from ..kernels import Structure
from ..tokens import vocab


@torch.no_grad()
def forbidden_instruments(ids_BN: Tensor, structure: Structure) -> Tensor:
    """INST ids that cannot be the next one in the bar: bool [B, N, INST], on the device of `ids_BN`.

    Groups stand in the order of the band list. So after a group only instruments further down the list may
    follow, and none that is not listed; those before the first group of a bar may be any of the list.

    Args:
        ids_BN: token ids, integer [B, N], of documents that begin with their band lists.
        structure: of the same tokens; its summaries bound the number of documents in a row.

    It never synchronizes with the host. What padding gets means nothing.
    """
    ids, doc = ids_BN.long(), structure.doc.long().clamp(min=0)
    index = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    is_listed = (ids >= vocab.BAND.start) & (ids < vocab.BAND.stop)
    is_inst = (ids >= vocab.INST.start) & (ids < vocab.INST.stop)
    is_bar = (ids >= vocab.CHORD.start) & (ids < vocab.CHORD.stop)

    # By document and instrument its place in the list, from 1; 0 if it is not listed. What is no BAND token
    # goes into a column that is cut off.
    instruments = len(vocab.BAND)
    column = torch.where(is_listed, doc * (instruments + 1) + ids - vocab.BAND.start, instruments)
    documents = structure.summary_doc.shape[1]
    place = torch.zeros(len(ids), documents * (instruments + 1), dtype=torch.int16, device=ids.device)
    place.scatter_(1, column, (1 + structure.position).to(torch.int16))
    place = place.view(len(ids), -1, instruments + 1)[..., :instruments]

    head = torch.where(is_inst | is_bar, index, -1).cummax(dim=1).values.clamp(min=0)
    of_head = ids.gather(1, head)
    rank = (of_head - vocab.INST.start).clamp(0, instruments - 1)
    of_token = place.gather(1, doc[..., None].expand(-1, -1, instruments))
    reached = of_token.gather(2, rank[..., None])
    in_group = is_inst.gather(1, head) & (head >= index - structure.position)
    return of_token <= torch.where(in_group[..., None], reached, 0)
