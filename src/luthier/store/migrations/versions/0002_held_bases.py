"""What a worker holds is more than a base's name: its quantization, or a tuned model's own weights. A job's pace."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    for table in ("jobs", "models", "workers"):
        op.add_column(table, sa.Column("quantization", sa.String(length=16), nullable=False, server_default=""))
        op.add_column(table, sa.Column("weights", sa.String(length=255), nullable=False, server_default=""))
    op.add_column("models", sa.Column("form", sa.String(length=16), nullable=False, server_default="adapter"))
    for column in ("pace_step", "pace_at", "stepped_at"):
        op.add_column("jobs", sa.Column(column, sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=True))
    # The key grows. What stands here counts for two minutes after it was asked for, so nothing is lost with it.
    op.drop_table("demands")
    op.create_table(
        "demands",
        sa.Column("base", sa.String(length=255), nullable=False),
        sa.Column("quantization", sa.String(length=16), nullable=False),
        sa.Column("weights", sa.String(length=255), nullable=False),
        sa.Column("wanted_at", sa.Float(precision=53), nullable=False),
        sa.PrimaryKeyConstraint("base", "quantization", "weights"),
    )
