"""Memory: what workers have, what jobs need, and what places said of bases."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.add_column("jobs", sa.Column("need_bytes", BIG, nullable=True))
    op.add_column("workers", sa.Column("place", sa.String(length=64), nullable=True))
    op.add_column("workers", sa.Column("free_bytes", BIG, nullable=True))
    op.add_column("workers", sa.Column("total_bytes", BIG, nullable=True))
    op.create_table(
        "places",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("bases", sa.JSON(), nullable=False),
        sa.Column("lease_until", sa.Float(precision=53), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "rooms",
        sa.Column("place", sa.String(length=64), nullable=False),
        sa.Column("base", sa.String(length=255), nullable=False),
        sa.Column("quantization", sa.String(length=16), nullable=False),
        sa.Column("weights", sa.String(length=255), nullable=False),
        sa.Column("base_bytes", BIG, nullable=False),
        sa.Column("free_bytes", BIG, nullable=False),
        sa.Column("total_bytes", BIG, nullable=False),
        sa.Column("until", sa.Float(precision=53), nullable=False),
        sa.PrimaryKeyConstraint("place", "base", "quantization", "weights"),
    )
