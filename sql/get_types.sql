-- A value of each type that statements take or give, and that asyncpg does not know by itself: lists.
-- It asks the server for those that are new to a connection, and puts jit off meanwhile, with which that took 3 s of
-- CPU. Behind a PgBouncer the two may reach different connections of the server, unless they are one transaction.
select null::bigint[], null::boolean[], null::bytea[], null::int[], null::jsonb[], null::text[], null::timestamptz[],
    null::uuid[], array(select row())
